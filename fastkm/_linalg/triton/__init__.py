"""What the Triton kernels share. A family's kernels stand in ``fastkm/<family>/triton``.

=====================  =============================================================================================
launch                 operators, launch options, workspaces, tensors as kernel arguments
tiles                  matrices as small aggregates, and the tiles of them that a program holds in registers
vectors                vectors that are spread over the threads of a program, and products with them
product                matrix products, destination first
factor                 Cholesky factors and inverses of triangles
patterns               weights and values of patterns that may be masked
condition              the apply phase of an update with weights that are known: posterior and writing
condition_backward     its gradient: posterior and writing
ridge                  weights of queries and what is read with them: addressing and reading
ridge_factored         factoring and solving as two operators: addressing and reading
ridge_backward         the gradient of both: addressing and reading
=====================  =============================================================================================

One program computes one memory, or one tile of it. Matrices that do not fit in registers lie in a workspace in global
memory that belongs to the program alone. What one thread of a program wrote another may read after a
``tl.debug_barrier()``.

Names: ``i_`` index, ``o_`` offsets, ``m_`` mask, ``p_`` pointer, ``s_`` stride, ``b_`` tile. Addresses are 64 bits
wide. Sizes of a memory: K rows, C columns; T patterns, Q queries; ``ld`` is the row stride of matrices in a workspace.
"""
