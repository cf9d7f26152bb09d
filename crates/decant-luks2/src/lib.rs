//! LUKS2: header, JSON area, keyslots and the sector cipher.
