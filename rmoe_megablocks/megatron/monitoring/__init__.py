"""What a run says of itself: the routers' health, losses that are not finite, reports, exact evaluation."""
