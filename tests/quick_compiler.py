"""XLA's flags for programs that are compiled far more than they compute."""

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""Without LLVM's optimisations, and with the older of two ways to write a fusion down: a third of the time."""
