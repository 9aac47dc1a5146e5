"""Pure training: loss, optimizer, state and step. Nothing here touches a file, a clock or a screen."""
