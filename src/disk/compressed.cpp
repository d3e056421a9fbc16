#include "disk/compressed.h"

#include <fmt/format.h>

#include <vector>

#include "base/buffers.h"
#include "base/try.h"

namespace qcow {
namespace {

/// Memory that a thread uses again and again: at most twice the largest cluster for a stream, once for a cluster.
std::span<std::byte> scratch(std::vector<std::byte>& memory, std::size_t bytes) {
    if (memory.size() < bytes) memory.resize(bytes);
    return std::span(memory).first(bytes);
}

}  // namespace

Result<void> read_compressed(const Storage& storage, const format::CompressedRange& range, Decompress decompress,
                             std::uint64_t cluster_size, std::uint64_t skip, Buffers to) {
    static thread_local std::vector<std::byte> stream_memory;
    static thread_local std::vector<std::byte> cluster_memory;

    const auto stream = scratch(stream_memory, range.length);
    const std::size_t there = TRY(storage.read(range.offset, stream));
    const auto decode = [&](std::span<std::byte> cluster) -> Result<void> {
        auto result = decompress(stream.first(there), cluster);
        if (!result) {
            return std::unexpected(std::move(result)
                                       .error()
                                       .in(fmt::format("compressed cluster at host offset {:#x}", range.offset.value))
                                       .in(storage.name()));
        }
        return {};
    };
    if (to.size() == cluster_size && to.contiguous()) return decode(to.front());
    const auto cluster = scratch(cluster_memory, cluster_size);
    TRY_VOID(decode(cluster));
    scatter(cluster.subspan(skip, to.size()), to);
    return {};
}

}  // namespace qcow
