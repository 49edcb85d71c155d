"""What a measurement leaves: frozen results, their JSON, and the keys they are logged by."""
