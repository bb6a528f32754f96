"""Live video: frames pushed one by one, questions at any moment, at constant work and memory per frame."""
