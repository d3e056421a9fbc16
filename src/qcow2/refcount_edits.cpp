#include "qcow2/refcount_edits.h"

#include "base/invariant.h"
#include "base/try.h"

namespace qcow::qcow2 {

Result<RefcountEdits::Block*> RefcountEdits::load(std::uint64_t index) {
    auto& block = loaded_[index];
    if (block.bytes.empty()) {
        block.bytes.resize(metadata_.cluster_size());
        TRY(metadata_.file().read(blocks_[index], block.bytes));
    }
    return &block;
}

Result<std::uint64_t> RefcountEdits::get(std::uint64_t cluster) {
    const std::uint64_t index = cluster / per_block_;
    if (index >= blocks_.size() || blocks_[index].value == 0) return 0;
    return format::refcount_at(TRY(load(index))->bytes, cluster % per_block_, order_);
}

Result<void> RefcountEdits::set(std::uint64_t cluster, std::uint64_t value) {
    const std::uint64_t index = cluster / per_block_;
    INVARIANT(index < blocks_.size() && blocks_[index].value != 0);
    auto* block = TRY(load(index));
    if (format::refcount_at(block->bytes, cluster % per_block_, order_) == value) return {};
    format::set_refcount(block->bytes, cluster % per_block_, order_, value);
    block->changed = true;
    return {};
}

Result<void> RefcountEdits::write() {
    for (auto& [index, block] : loaded_) {
        if (!block.changed) continue;
        TRY_VOID(metadata_.file().write(blocks_[index], block.bytes));
        block.changed = false;
    }
    return {};
}

}  // namespace qcow::qcow2
