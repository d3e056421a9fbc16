#pragma once
// LUKS1 on a Storage: the key of the data out of a key slot, new headers, changes of key slots.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "crypto/cipher.h"
#include "qcow/amend.h"
#include "qcow/create.h"
#include "qcow/key.h"
#include "qcow/storage.h"

namespace qcow::luks {

/// Where a header lies with its key material.
struct Area {
    const Storage& file;
    HostOffset at;
    std::uint64_t bytes = 0;  ///< at most so many
};

/// The seconds of one processor that trying a key takes at most: every slot in use is tried. Errors: Errc::corrupt,
/// unsupported; io.
Result<double> key_seconds(const Area& area);

/// Errors: Errc::limit_exceeded where the work of a header, and that of `others` of its chain, is more than allowed.
Result<void> verify_work(const Storage& file, double seconds, double max_seconds, double others = 0);

/// Says that a key opens none of `slots` key slots, and what may be wrong with it.
std::string wrong_key_text(std::size_t slots, const Secret& key);

/// Returns the cipher of the data. Tries the key slots in use, one derivation each.
/// Errors: Errc::encrypted: the key is wrong; Errc::limit_exceeded: the header asks for more than `max_seconds` of
/// work, which is found before any of it is done; Errc::corrupt, unsupported; io.
Result<std::shared_ptr<const crypto::SectorCipher>> unlock(const Area& area, const Secret& key, double max_seconds);

/// Verifies, without a key, that there can be one that opens the header: all its numbers and names, and the state of
/// its key slots. Errors: Errc::corrupt; Errc::unsupported, also if this build does not have the cipher; io.
Result<void> verify_header(const Area& area);

/// A new header with its key material, and the cipher of the data.
struct NewHeader {
    std::vector<std::byte> bytes;
    std::shared_ptr<const crypto::SectorCipher> cipher;
};

/// Returns the length of the header of a new image. Errors: Errc::invalid_argument, unsupported.
Result<std::uint64_t> header_bytes(const EncryptionOptions& options);

/// Makes a header of header_bytes() with a random key of the data, and one key slot. Takes about `iter_time_ms`, and
/// an eighth of it more. Errors: Errc::invalid_argument, unsupported.
Result<NewHeader> make_header(const EncryptionOptions& options);

/// Changes key slots, durably, and first overwrites key material that an interrupted change left in unused ones. Can be
/// stopped until the change begins. `file` is the writable file of the area. `existing` opens the image; only adding
/// needs it. See KeySlotChange. Errors: Errc::encrypted, invalid_argument, cancelled; those of unlock; Errc::io.
Result<void> change_slots(Storage& file, HostOffset at, std::uint64_t bytes, const KeySlotChange& change,
                          const Secret* existing, double max_seconds, const JobControl& control);

/// The cipher of the legacy encryption of qcow and qcow2. Any key is accepted: the format cannot tell a wrong one.
Result<std::shared_ptr<const crypto::SectorCipher>> legacy_cipher(const Secret& key);

}  // namespace qcow::luks
