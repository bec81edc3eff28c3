"""The operators: their contract, their specification, and the backends that compute them."""
