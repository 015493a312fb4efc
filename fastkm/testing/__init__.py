"""The engine of verification that check, bench, benchmarks/, tests/ and tools/ share, in the spirit of torch.testing.

======================  ================================================================================
module                  holds
======================  ================================================================================
operations              the registry: one entry for each operation; every list of operations comes from it
definitions, counts     what an operation must compute, and the fewest flops it takes
presets, images         shapes in use; real images and a linear code for them
episodes, operands      inputs of public functions, made of images; inputs of registered operators
gradients               forward and backward as one computation
verification, timing    a verdict on every backend; the one timer
roofline, peak          the time that no kernel can beat on one GPU; peak memory of a step
extras                  optional packages, and errors the user can put right
======================  ================================================================================

Nothing here imports a command. Images are here because check, bench and the example of the generative model read the
same digits and folders.
"""
