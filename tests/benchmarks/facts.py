"""A device that no test measures."""

FACTS = {
    "device": "Card 9000",
    "driver": None,
    "python": "3.12",
    "versions": {},
    "ceilings": {"matmul_size": 1, "matmul_tflops": 1.0, "copy_mib": 1, "copy_tb_per_s": 1.0},
}
