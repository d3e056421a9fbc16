#include "qcow2/compressed_writes.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/try.h"

namespace qcow::qcow2 {

Result<void> CompressedWrites::verify(GuestOffset at, std::uint64_t length) const {
    const auto& metadata = metadata_.metadata();
    if (metadata.rules().external_data)
        return fail(Errc::unsupported, metadata.file().name(), "an external data file cannot hold compressed clusters");
    if (metadata.header().crypt != format::Crypt::none) {
        return fail(Errc::unsupported, metadata.file().name(),
                    "the image is encrypted, and compressed clusters would not be: the format leaves them readable");
    }
    const std::uint64_t cluster_size = metadata.cluster_size();
    const std::uint64_t end = at.value + length;
    if (is_aligned(at.value, cluster_size) && (is_aligned(end, cluster_size) || end == mapping_.disk_size())) return {};
    return fail(
        Errc::invalid_argument, metadata.file().name(),
        fmt::format("{} bytes at guest offset {:#x} are not whole clusters of {}", length, at.value, cluster_size));
}

Result<void> CompressedWrites::write(GuestOffset at, std::span<const std::byte> from, codec::Compressor& compressor) {
    std::vector<std::byte> padded(metadata_.metadata().cluster_size());
    while (!from.empty()) {
        const auto part = from.first(std::min(from.size(), padded.size()));
        std::memcpy(padded.data(), part.data(), part.size());
        std::memset(padded.data() + part.size(), 0, padded.size() - part.size());
        if (!TRY(write_cluster(at, padded, compressor))) TRY_VOID(writes_.write(at, part));
        at += part.size();
        from = from.subspan(part.size());
    }
    return {};
}

/// Returns false if the cluster does not become smaller, or would lie where an entry cannot point.
Result<bool> CompressedWrites::write_cluster(GuestOffset at, std::span<const std::byte> from,
                                             codec::Compressor& compressor) {
    std::vector<std::byte> stream(from.size() - 1);
    const std::size_t length = compressor.compress(from, stream);
    if (length == 0) return false;
    auto& metadata = metadata_.metadata();
    const Epochs::Guard epoch(metadata_.epochs());
    const std::uint64_t cluster = mapping_.cluster_of(at);
    const auto guard = mapping_.lock({cluster, cluster + 1});
    const auto old = TRY(mapping_.load({cluster, cluster + 1}));
    Change change(metadata_);
    const format::CompressedRange range{TRY(change.take_stream(length)), length};
    const unsigned cluster_bits = metadata.header().cluster_bits;
    if (range.offset.value >= bit(format::compressed_offset_bits(cluster_bits))) return false;
    TRY_VOID(metadata.file().write(range.offset, std::span(stream).first(length)));
    const format::L2Entry entry{format::compressed_word(range, cluster_bits)};
    TRY_VOID(mapping_.replace(change, cluster, old, {&entry, 1}, Barrier::flush));
    return true;
}

}  // namespace qcow::qcow2
