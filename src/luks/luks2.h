#pragma once
// LUKS2 on a Storage. libcryptsetup reads the header and finds the key; the data are not its business.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "crypto/cipher.h"
#include "qcow/image.h"
#include "qcow/key.h"
#include "qcow/storage.h"

namespace qcow::luks {

/// What a header tells without a key.
struct Luks2 {
    EncryptionInfo info;
    HostOffset data;                     ///< where the data begin
    std::optional<std::uint64_t> bytes;  ///< of data; nothing: up to the end of the file
    std::size_t sector_bytes = 512;      ///< the unit of encryption
    std::uint64_t first_sector = 0;      ///< the number of the first sector
};

/// Reads a header. libcryptsetup gets a copy of it, in memory, and never the file.
/// Errors: Errc::unsupported: libcryptsetup is missing, or the volume has integrity data, is being reencrypted, or
/// needs something else that is not known; Errc::corrupt, limit_exceeded; io.
Result<Luks2> read_luks2(const Storage& file);

/// The seconds of one processor that trying a key takes at most. Errors: those of read_luks2; Errc::limit_exceeded: the
/// header asks for more than half of the machine's memory.
Result<double> luks2_key_seconds(const Storage& file);

/// Returns the cipher of the data. Errors: those of read_luks2; Errc::encrypted: the key is wrong;
/// Errc::limit_exceeded: the header asks for more than `max_seconds` of work, or for more than half of the machine's
/// memory, which is found before any of it is done.
Result<std::shared_ptr<const crypto::SectorCipher>> unlock_luks2(const Storage& file, const Secret& key,
                                                                 double max_seconds);

}  // namespace qcow::luks
