#include "qcow/files_in_use.h"

#include <fmt/format.h>

#include <set>

#include "base/try.h"
#include "format/file_name.h"
#include "qcow/image.h"

namespace qcow {
namespace {

/// The role of the layer `depth` files below one that has `role`.
std::string role_of(unsigned depth, const std::string& role) {
    if (depth == 0) return role;
    return fmt::format("{} backing file of {}", depth == 1 ? "the" : "a", role);
}

std::string role_of_data_file(unsigned depth, const std::string& role) {
    return "the data file of " + role_of(depth, role);
}

}  // namespace

Result<void> FilesInUse::add(Use use, const Image& image, const std::string& role) {
    std::shared_ptr<const Image> below;
    const Image* layer = &image;
    for (unsigned depth = 0; layer != nullptr; ++depth) {
        const auto paths = layer->files();
        for (std::size_t i = 0; i < paths.size(); ++i)
            TRY_VOID(add(use, paths[i], i == 0 ? role_of(depth, role) : role_of_data_file(depth, role)));
        use = Use::read;
        below = layer->backing();
        layer = below.get();
    }
    return {};
}

Result<void> FilesInUse::add_unopened(Use use, const std::string& path, const OpenOptions& options,
                                      const std::string& role) {
    TRY_VOID(add(use, path, role));
    auto storage = open_file(path, {.force_share = true});
    OpenOptions alone;
    alone.follow = false;
    alone.format = options.format;
    std::set<std::string> seen;
    for (unsigned depth = 0; storage && seen.insert((*storage)->identity()).second; ++depth) {
        const bool guessed = !alone.format;
        const auto image = open_image(*storage, alone);
        if (!image) break;
        const auto info = (*image)->info();
        // As when it is opened: what a layer below names counts only where it was said to be an image.
        if (!info || (guessed && depth > 0)) break;
        const auto& by = (*storage)->name();
        if (const auto& data = info->data_file; data && !data->path.empty())
            TRY_VOID(add(use, data->path, role_of_data_file(depth, role)));
        const auto& backing = info->backing;
        if (!backing || backing->path.empty()) break;
        use = Use::read;
        TRY_VOID(add(use, backing->path, role_of(depth + 1, role)));
        alone.format = format_from_name(backing->format);
        FileReference reference{FileReference::Role::backing_file, backing->name, backing->path, by};
        reference.guessed = guessed;
        storage = options.gate(reference);
    }
    return {};
}

}  // namespace qcow
