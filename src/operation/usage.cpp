#include "base/try.h"
#include "qcow/copy.h"

namespace qcow {

Result<Usage> measure_usage(Disk& disk) {
    Usage usage;
    TRY_VOID(each_extent(
        disk, {0}, disk.size(),
        [&](const Extent& extent) -> Result<void> {
            if (extent.kind == Extent::Kind::unallocated) {
                usage.unallocated_bytes += extent.length;
                return {};
            }
            if (usage.layers.size() <= extent.depth) usage.layers.resize(extent.depth + 1);
            auto& layer = usage.layers[extent.depth];
            if (extent.kind == Extent::Kind::zero) {
                layer.zero_bytes += extent.length;
            } else {
                (extent.compressed ? layer.compressed_bytes : layer.data_bytes) += extent.length;
                ++layer.fragments;
            }
            return {};
        }));
    return usage;
}

}  // namespace qcow
