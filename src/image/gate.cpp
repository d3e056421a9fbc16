#include <fmt/format.h>

#include <filesystem>

#include "base/within_memory.h"
#include "format/file_name.h"
#include "image/gate.h"
#include "storage/directory.h"

namespace qcow {

namespace fs = std::filesystem;

namespace {

FileOptions options_for(const FileReference& reference, bool force_share, bool direct) {
    FileOptions options;
    options.writable = reference.writable;
    options.force_share = force_share && !reference.writable;
    options.direct = direct && reference.writable;
    return options;
}

/// The path of a file beneath `directory`, as seen from there.
Result<std::string> path_beneath(const std::string& directory, const FileReference& reference) {
    const auto& path = reference.location.path;
    const auto refuse = [&](std::string why) { return fail(Errc::refused_by_policy, path, std::move(why)); };
    if (reference.location.scheme != Scheme::file)
        return refuse("is no file, and an untrusted image may only name plain files");
    if (reference.guessed) {
        return refuse(
            "what names it was only guessed to be an image, from contents that a guest may have written; say its "
            "format to have it opened");
    }
    if (format::is_description(reference.name))
        return refuse("is named by a \"json:\" description, and an untrusted image may only name plain files");
    if (fs::path(TRY(format::parse_file_name(reference.name, reference.role)).path).is_absolute()) {
        return refuse(
            "is an absolute path, and an untrusted image may only name files beneath its directory, as seen from "
            "there");
    }
    return fs::path(path).lexically_relative(directory).string();
}

}  // namespace

Gate no_files() {
    return [](const FileReference& reference) {
        return within_memory([&]() -> Result<std::shared_ptr<Storage>> {
            return fail(Errc::refused_by_policy, reference.named_by,
                        fmt::format("it names the {} \"{}\", and opening further files was not allowed",
                                    reference.role == FileReference::Role::backing_file ? "backing file" : "data file",
                                    reference.name));
        });
    };
}

Gate local_files(bool force_share, bool direct) {
    return [=](const FileReference& reference) {
        return open_storage(reference.location, options_for(reference, force_share, direct));
    };
}

Gate files_beneath(const std::string& directory, bool force_share, bool direct) {
    return [=, opened = std::make_shared<const Directory>(directory)](const FileReference& reference) {
        return within_memory([&]() -> Result<std::shared_ptr<Storage>> {
            const auto path = TRY(path_beneath(directory, reference));
            return opened->open_file(path, reference.location.path, options_for(reference, force_share, direct));
        });
    };
}

Gate gate_for(const ImageSpec& spec, bool force_share) {
    if (!spec.untrusted) return local_files(force_share, spec.direct);
    return files_beneath(fs::path(spec.location.path).parent_path().string(), force_share, spec.direct);
}

KeySource keys_for(const ImageSpec& spec) {
    if (!spec.keys) return {};
    const auto backing = spec.backing ? spec.backing->secret : std::string();
    return [keys = spec.keys, top = spec.location, backing](const KeyRequest& request) {
        auto named = request;
        named.image = top.path;
        if (request.depth == 0) named.secret = top.secret;
        if (request.depth == 1 && !backing.empty()) named.secret = backing;
        return keys(named);
    };
}

}  // namespace qcow
