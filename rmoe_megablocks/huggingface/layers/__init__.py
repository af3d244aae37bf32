"""What a decoder layer is made of, and the loss that balances its experts."""
