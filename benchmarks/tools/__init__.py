"""What looks at kernels and at results: resources, launch choices, pictures."""
