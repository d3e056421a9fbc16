// The writer's compressed clusters.

#include <fmt/format.h>

#include <cstring>

#include "base/try.h"
#include "qcow2/writer.h"

namespace qcow::qcow2 {

Result<void> Writer::write_compressed(GuestOffset at, std::span<const std::byte> from, std::optional<int> level) {
    if (rules_.external_data)
        return fail(Errc::unsupported, core_->file->name(), "an external data file cannot hold compressed clusters");
    const std::uint64_t cluster_size = bit(cluster_bits_);
    const GuestOffset end = at + from.size();
    if (!is_aligned(at.value, cluster_size) || (!is_aligned(end.value, cluster_size) && end.value != size_)) {
        return fail(Errc::invalid_argument, core_->file->name(),
                    fmt::format("{} bytes at guest offset {:#x} are not whole clusters of {}", from.size(), at.value,
                                cluster_size));
    }
    const auto compressor =
        TRY(within_memory([&] { return codec::make_compressor(core_->header.compression, level); }));
    return write_back_.attempt([&]() -> Result<void> {
        TRY_VOID(begin_writing(at, from.size()));
        std::vector<std::byte> padded(cluster_size);
        while (!from.empty()) {
            const auto part = from.first(std::min<std::size_t>(from.size(), cluster_size));
            std::memcpy(padded.data(), part.data(), part.size());
            std::memset(padded.data() + part.size(), 0, cluster_size - part.size());
            if (!TRY(compress_cluster(at, padded, *compressor))) TRY_VOID(write_mapped(at, part));
            at += part.size();
            from = from.subspan(part.size());
        }
        return finish_request();
    });
}

/// False: it does not become smaller, or would lie where an entry cannot say so.
Result<bool> Writer::compress_cluster(GuestOffset at, std::span<const std::byte> from, codec::Compressor& compressor) {
    std::vector<std::byte> stream(from.size() - 1);
    const std::size_t length = compressor.compress(from, stream);
    if (length == 0) return false;
    const Epochs::Guard guard(epochs_);
    const std::uint64_t cluster = at.value >> cluster_bits_;
    const RangeLocks::Guard lock(clusters_, cluster, cluster + 1);
    const auto old = TRY(load_entries({cluster, cluster + 1}));
    const format::CompressedRange range{TRY(allocator_.take_bytes(length)), length};
    if (range.offset.value >= bit(format::compressed_offset_bits(cluster_bits_))) {
        allocator_.retire_stream(range);
        return false;
    }
    auto written = core_->file->write(range.offset, std::span(stream).first(length));
    if (written) {
        const L2Entry entry{format::compressed_word(range, cluster_bits_)};
        written = store_entries(cluster, {&entry, 1}, true);
    }
    if (!written) {
        allocator_.retire_stream(range);
        return std::unexpected(std::move(written).error());
    }
    retire(old);
    return true;
}

}  // namespace qcow::qcow2
