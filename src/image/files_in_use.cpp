#include "qcow/files_in_use.h"

#include <fmt/format.h>

#include <set>

#include "base/within_memory.h"
#include "format/file_name.h"
#include "image/gate.h"

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

/// The one reason for which something that is there must not be left out.
template <class T>
bool is_no_memory(const Result<T>& result) {
    return !result && result.error().code == Errc::no_memory;
}

}  // namespace

Result<void> FilesInUse::add(Use use, const Image& image, const std::string& role) {
    return within_memory([&]() -> Result<void> {
        Use used = use;
        std::shared_ptr<const Image> below;
        const Image* layer = &image;
        for (unsigned depth = 0; layer != nullptr; ++depth) {
            const auto paths = layer->files();
            for (std::size_t i = 0; i < paths.size(); ++i)
                TRY_VOID(add(used, paths[i], i == 0 ? role_of(depth, role) : role_of_data_file(depth, role)));
            used = Use::read;
            below = layer->backing();
            layer = below.get();
        }
        return {};
    });
}

Result<void> FilesInUse::add(Use use, const Image& image, const ImageSpec& spec, const std::string& role) {
    TRY_VOID(add(use, image, role));
    const bool replaces = spec.backing || spec.location.alone;
    return replaces ? add_unopened(use, spec, role) : Result<void>();
}

Result<void> FilesInUse::add_unopened(Use use, const ImageSpec& spec, const std::string& role) {
    return within_memory([&]() -> Result<void> {
        Use used = use;
        TRY_VOID(add(used, spec.location.path, role));
        const auto gate = gate_for(spec, true);
        auto storage = open_storage(spec.location, {.force_share = true});
        OpenOptions alone;
        alone.follow = false;
        alone.format = spec.location.format;
        std::set<std::string> seen;
        for (unsigned depth = 0; storage && seen.insert((*storage)->identity()).second; ++depth) {
            const bool guessed = !alone.format;
            const auto image = open_image(*storage, alone);
            if (is_no_memory(image)) return std::unexpected(image.error());
            if (!image) break;
            const auto info = (*image)->info();
            if (is_no_memory(info)) return std::unexpected(info.error());
            // As when it is opened: what a layer below names counts only where it was said to be an image.
            if (!info || (guessed && depth > 0)) break;
            if (const auto& data = info->data_file; data && !data->path.empty())
                TRY_VOID(add(used, data->path, role_of_data_file(depth, role)));
            const auto& backing = info->backing;
            if (!backing || backing->path.empty()) break;
            used = Use::read;
            TRY_VOID(add(used, backing->path, role_of(depth + 1, role)));
            alone.format = format_from_name(backing->format);
            auto location = format::parse_file_name(backing->name);
            if (!location) break;
            location->path = backing->path;
            storage = gate({.name = backing->name,
                            .location = *std::move(location),
                            .named_by = (*storage)->name(),
                            .guessed = guessed});
        }
        if (is_no_memory(storage)) return std::unexpected(storage.error());
        return {};
    });
}

}  // namespace qcow
