"""Ways out of Keras. TensorFlow is imported inside functions only."""
