"""Audio files → samples: 16 kHz, mono, exactly those that were asked for.

In reading order: `files` opens regular files, and byte ranges of them. `decoding` gives frames at the file's own rate.
`crops` measures a file and reads a part of it, resampled. `inspection` looks at many files in worker processes, and
keeps their lengths.
"""
