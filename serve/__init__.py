"""The read replica: representations over HTTP for services that hold no view of their own."""
