#include "base/within_memory.h"
#include "qcow/copy.h"

namespace qcow {
namespace {

/// Adds an extent to what its layer holds.
void count(Usage& usage, const Extent& extent) {
    if (extent.kind == Extent::Kind::unallocated) {
        usage.unallocated_bytes += extent.length;
        return;
    }
    if (usage.layers.size() <= extent.depth) usage.layers.resize(extent.depth + 1);
    auto& layer = usage.layers[extent.depth];
    if (extent.kind == Extent::Kind::zero) {
        layer.zero_bytes += extent.length;
    } else {
        (extent.compressed ? layer.compressed_bytes : layer.data_bytes) += extent.length;
        ++layer.fragments;
    }
}

}  // namespace

Result<Usage> measure_usage(Disk& disk) {
    return within_memory([&]() -> Result<Usage> {
        Usage usage;
        TRY_VOID(each_extent(
            disk, {0}, disk.size(),
            [&](const Extent& extent) {
                count(usage, extent);
                return Result<void>();
            }));
        return usage;
    });
}

}  // namespace qcow
