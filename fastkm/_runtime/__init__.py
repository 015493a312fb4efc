"""What every public function shares: the way into a kernel, its guards and its gradient."""
