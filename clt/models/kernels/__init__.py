"""The few operations that training spends its time in, each in several forms behind one function.

matmul.py    which library multiplies matrices (measured once per machine)
sparse.py    gathers over decoder rows, and choosing what is kept
gate.py      the non-linearity and its penalties, dense, in one pass
torch_*.py   the same in plain torch operations: always there, and what tests compare with
build.py     compiles the C files beside it, if there is a compiler
triton_*.py  the same on a GPU, if triton is installed
"""
