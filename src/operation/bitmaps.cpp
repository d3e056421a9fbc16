#include "qcow/bitmaps.h"

#include <fmt/format.h>

#include "base/within_memory.h"
#include "operation/bitmap_copies.h"
#include "qcow/files_in_use.h"

namespace qcow {

Result<void> change_bitmaps(const BitmapJob& job, const JobControl& control) {
    return within_memory([&]() -> Result<void> {
        using enum FilesInUse::Use;
        auto spec = job.image;
        if (!spec.write) spec.write.emplace();
        spec.follow = false;  // bitmaps are about the image alone
        auto actions = job.actions;
        FilesInUse in_use;
        TRY_VOID(in_use.add_unopened(written, spec, "the image"));
        if (job.source) {
            const auto source = TRY(open_image(*job.source, control.warn));
            TRY_VOID(in_use.add(read, *source, *job.source, "the image with the source bitmap"));
            for (auto& action : actions) action.source_image = source;
        }
        const auto image = TRY(open_image(spec, control.warn));
        TRY_VOID(image->change_bitmaps(actions));
        return image->close();
    });
}

Result<std::vector<BitmapAction>> copies_of_bitmaps(const std::shared_ptr<Image>& source, bool skip_broken,
                                                    Warnings& warnings) {
    const auto info = TRY(source->info());
    if (info.bitmaps_error) return std::unexpected(*info.bitmaps_error);
    std::vector<BitmapAction> actions;
    for (const auto& bitmap : info.bitmaps) {
        const auto all =
            source->each_dirty(bitmap.name, {0}, source->size(), [](const DirtyRun&) { return Result<void>(); });
        if (!all && skip_broken && all.error().code == Errc::corrupt) {
            warnings.add({Warning::Kind::odd_image, all.error().message() + "; the copy does not have it"});
            continue;
        }
        if (!all) {
            auto error = all.error();
            error.what += "; --skip-broken-bitmaps leaves it out";
            return std::unexpected(std::move(error));
        }
        actions.push_back({.kind = BitmapAction::Kind::add, .bitmap = bitmap.name, .granularity = bitmap.granularity});
        actions.push_back(
            {.kind = BitmapAction::Kind::merge, .bitmap = bitmap.name, .source = bitmap.name, .source_image = source});
        if (!bitmap.enabled) actions.push_back({.kind = BitmapAction::Kind::disable, .bitmap = bitmap.name});
    }
    return actions;
}

}  // namespace qcow
