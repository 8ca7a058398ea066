"""The idea itself: kernels with one owner, and the places that read them."""
