"""XLA's flags for programs that are compiled far more than they compute."""

FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
"""The older of two ways to write a fusion down. With LLVM's optimisations left out, by a variable of the environment
that all tests and what they start have, compiling takes a third of the time. And a program in one piece: to divide it
among threads that have other tests to run takes longer."""
