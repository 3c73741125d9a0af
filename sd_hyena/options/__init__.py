"""Every option, declared once, with its rules; how a command starts and ends. Never imports torch."""
