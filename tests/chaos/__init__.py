"""`make chaos`: a system under load and under seeded faults, whose every count is proven in between and at the end."""
