"""What sampling is made of: the choice of an id, and the step that decodes one position."""
