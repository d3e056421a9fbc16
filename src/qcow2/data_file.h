#pragma once
// Guest data in and out of the file that holds them.

#include <cstdint>
#include <memory>
#include <span>

#include "disk/encrypted.h"
#include "qcow2/metadata/metadata.h"

namespace qcow::qcow2 {

class WritableMetadata;

/// Returns the cipher of the data of an encrypted image. Errors: those of luks::unlock.
Result<std::shared_ptr<const crypto::SectorCipher>> unlock(const format::Header& header, const Storage& file,
                                                           const Secret& key, double max_kdf_seconds);

/// The file that the clusters of guest data lie in: the image file, or an external data file.
///
/// Fresh bytes, those of a cluster that was just taken, are zeros in the image file. In an external data file a guest
/// cluster has a fixed place, which may hold anything: whoever takes it writes all of it. So it is in an encrypted
/// image, since zeros in the file do not decrypt to zeros.
///
/// Encryption ends here: the rest of the engine sees decrypted bytes. The number of a sector, which its encryption
/// depends on, is that of its place in the file with LUKS, and that of its place in the disk with the legacy AES.
///
/// Thread safety: all functions but protect() may be called from any number of threads.
class DataFile {
public:
    /// `external`: the external data file of an image that has one; null where it was not opened. `cipher`: of an
    /// encrypted image; null where its key is not known.
    DataFile(const Metadata& metadata, const std::shared_ptr<Storage>& external,
             std::shared_ptr<const crypto::SectorCipher> cipher);

    [[nodiscard]] bool is_open() const { return file_ != nullptr; }
    [[nodiscard]] bool is_encrypted() const { return metadata_.header().crypt != format::Crypt::none; }
    /// Whether the data are not encrypted, or the key is known.
    [[nodiscard]] bool is_unlocked() const { return !is_encrypted() || encryption_; }
    [[nodiscard]] bool is_external() const { return metadata_.rules().external_data; }
    /// Whether the file is a raw image by itself, which others read without looking at the qcow2 image.
    [[nodiscard]] bool is_raw() const { return raw_; }
    [[nodiscard]] bool fresh_bytes_are_zeros() const { return !is_external() && !is_encrypted(); }
    /// The file; null where it is not open.
    [[nodiscard]] const Storage* storage() const { return file_.get(); }

    /// Reads guest bytes. `at` is where the guest sees them. Errors: Errc::corrupt where they lie past the end of the
    /// file, with Error::unreadable; io.
    Result<void> read(HostOffset host, GuestOffset at, Buffers to) const;

    /// Writes guest bytes. Errors: Errc::corrupt where metadata lie there, which marks the image as corrupt; io,
    /// no_space.
    Result<void> write(HostOffset host, GuestOffset at, ConstBuffers from);

    // The following are about external data files alone.

    /// Makes guest bytes zeros. A raw file grows as far as needed; another one has its bytes behind its end be zeros
    /// anyway.
    Result<void> write_zeroes(HostOffset host, std::uint64_t length);
    /// Makes the file as long as the disk.
    Result<void> resize(std::uint64_t size) { return file_->resize(size); }
    /// The Storage to flush before the image file is; null: there is none apart.
    [[nodiscard]] Storage* to_flush() const { return is_external() ? file_.get() : nullptr; }

    /// From now on no write may reach these metadata; null: no more. No request may be in flight.
    void protect(WritableMetadata* metadata) { protected_ = metadata; }

private:
    /// See EncryptedBytes.
    [[nodiscard]] std::uint64_t position(HostOffset host, GuestOffset at) const {
        return metadata_.header().crypt == format::Crypt::aes ? at.value : host.value;
    }

    const Metadata& metadata_;
    std::shared_ptr<Storage> file_;
    std::unique_ptr<EncryptedBytes> encryption_;  // null: not encrypted, or the key is not known
    bool raw_;
    WritableMetadata* protected_ = nullptr;
};

}  // namespace qcow::qcow2
