"""What operators watch and steer a running server with."""
