#include "qcow2/known_bitmaps.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/try.h"
#include "qcow/text.h"
#include "qcow2/metadata/directories.h"

namespace qcow::qcow2 {

Result<const KnownBitmaps::Known*> KnownBitmaps::find(std::string_view name) {
    const std::lock_guard lock(mutex_);
    if (const auto known = known_.find(name); known != known_.end()) return &known->second;
    auto bitmaps = TRY(read_bitmaps(metadata_));
    const auto found = std::ranges::find_if(bitmaps, [&](const auto& bitmap) { return bitmap.info.name == name; });
    if (found == bitmaps.end()) {
        const auto state = metadata_.state();
        const bool stale = state.bitmaps && !state.bitmaps_consistent();
        return fail(Errc::not_found, metadata_.file().name(),
                    fmt::format("there is no bitmap \"{}\"{}", printable(name), stale ? " that is up to date" : ""));
    }
    const auto index = static_cast<std::size_t>(found - bitmaps.begin());
    return &known_.emplace(name, Known{std::move(*found), index}).first->second;
}

}  // namespace qcow::qcow2
