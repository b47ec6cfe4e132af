"""The model side: parameters as one vector, their gradients, the optimizer around it."""
