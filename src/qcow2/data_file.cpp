#include "qcow2/data_file.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/bits.h"
#include "base/try.h"
#include "disk/range.h"
#include "luks/volume.h"
#include "qcow2/metadata/writable_metadata.h"

namespace qcow::qcow2 {

Result<std::shared_ptr<const crypto::SectorCipher>> unlock(const format::Header& header, const Storage& file,
                                                           const Secret& key, double max_kdf_seconds) {
    if (header.crypt == format::Crypt::aes) return luks::legacy_cipher(key);
    const auto& [at, length] = *header.encryption;
    return luks::unlock({file, at, length}, key, max_kdf_seconds);
}

DataFile::DataFile(const Metadata& metadata, const std::shared_ptr<Storage>& external,
                   std::shared_ptr<const crypto::SectorCipher> cipher)
    : metadata_(metadata),
      file_(is_external() ? external : metadata.shared_file()),
      encryption_(cipher ? std::make_unique<EncryptedBytes>(std::move(cipher)) : nullptr),
      raw_(is_external() && (metadata.state().autoclear & format::autoclear::raw_external_data) != 0) {}

Result<void> DataFile::read(HostOffset host, GuestOffset at, Buffers to) const {
    const std::size_t there =
        TRY(encryption_ ? encryption_->read(*file_, host, position(host, at), to) : file_->read(host, to));
    if (there == to.size()) return {};
    const auto& geometry = metadata_.geometry();
    std::uint64_t file_end = TRY(file_->size());
    // The last cluster of an image file need not be there to its end.
    if (!is_external()) file_end = geometry.clusters(file_end) * geometry.cluster_size();
    if (host.value + to.size() <= file_end) return {};
    const std::uint64_t in_file = file_end - std::min(host.value, file_end);
    const auto thing = fmt::format("the data of guest offset {:#x}", at.value + there);
    return unreadable({Errc::corrupt, file_->name(), metadata_.past_the_end(*file_, thing, host + there)}, at + in_file,
                      to.size() - in_file);
}

Result<void> DataFile::write(HostOffset host, GuestOffset at, ConstBuffers from) {
    if (protected_ != nullptr && !is_external()) TRY_VOID(protected_->verify_no_metadata(host, from.size()));
    return encryption_ ? encryption_->write(*file_, host, position(host, at), from) : file_->write(host, from);
}

Result<void> DataFile::write_zeroes(HostOffset host, std::uint64_t length) {
    return raw_ ? make_zeros(*file_, host, length) : file_->write_zeroes(host, length);
}

}  // namespace qcow::qcow2
