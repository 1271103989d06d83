"""Studies of a model on someone's own data: which way of training is worth its cost, and where a step's time goes."""
