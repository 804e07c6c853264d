"""The gateway's own server: a strict and fast edge towards clients, and the supervision of its workers."""
