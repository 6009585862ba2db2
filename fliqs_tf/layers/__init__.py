"""What a quantized network is made of."""
