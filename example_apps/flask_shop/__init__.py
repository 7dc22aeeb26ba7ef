"""A Flask shop: orders, an export, and a page that fails."""
