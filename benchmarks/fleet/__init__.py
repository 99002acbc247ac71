"""What a rolling run over a fleet costs the controller, with simulated machines and Xen (`make bench-fleet`)."""
