"""What Triton kernels take beside their operands; here, since plans count with it where there is no Triton."""

ROWS = 4096  # samples of one GEMM of global_topk
ROOM, SPARE = 8, 256  # a sample may hold ROOM k + SPARE candidates
CANDIDATES = 2**27  # bytes of candidates, unless a single sample needs more
PIECE = 128  # entries of a latent that are summed together; at N 4096, k 64: 2048 rows of scratch a matrix
