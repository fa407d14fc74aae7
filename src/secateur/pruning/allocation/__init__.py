"""Allocations: how the zeros of a sparse method are distributed over linears. The total is always the uniform one."""
