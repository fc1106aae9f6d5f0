"""Stage three: what the quotas of a group tell about its rows."""
