#include "server/nbd/session.h"

#include <algorithm>

#include "base/bits.h"
#include "base/try.h"

namespace qcow::nbd {
namespace {

constexpr std::uint32_t state_hole = 1;
constexpr std::uint32_t state_zero = 2;

NbdContext of_extents(std::string name, const std::shared_ptr<Disk>& disk, std::uint32_t (*flags)(const Extent&)) {
    return {std::move(name), [disk, flags](GuestOffset at, std::uint64_t limit) -> Result<NbdStatus> {
                const auto extent = TRY(disk->extent(at, limit));
                return NbdStatus{std::min(extent.length, limit), flags(extent)};
            }};
}

}  // namespace

std::size_t chunk_bytes(const Disk& disk) { return std::clamp(disk.block_size(), 256 * KiB, 2 * MiB); }

std::vector<NbdContext> built_in_contexts(const NbdExport& exported) {
    std::vector<NbdContext> contexts;
    contexts.push_back(of_extents("base:allocation", exported.disk, [](const Extent& extent) {
        return extent.kind == Extent::Kind::data ? 0 : state_hole | state_zero;
    }));
    if (exported.allocation_depth) {
        contexts.push_back(
            of_extents("qemu:allocation-depth", exported.disk, [](const Extent& extent) -> std::uint32_t {
                return extent.kind == Extent::Kind::unallocated ? 0 : extent.depth + 1;
            }));
    }
    return contexts;
}

}  // namespace qcow::nbd
