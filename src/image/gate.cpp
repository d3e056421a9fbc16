#include <fmt/format.h>

#include <filesystem>

#include "base/try.h"
#include "format/file_name.h"
#include "qcow/image.h"
#include "storage/directory.h"

namespace qcow {

namespace fs = std::filesystem;

Gate no_files() {
    return [](const FileReference& reference) -> Result<std::shared_ptr<Storage>> {
        return fail(Errc::refused_by_policy, reference.named_by,
                    fmt::format("it names the {} \"{}\", and opening further files was not allowed",
                                reference.role == FileReference::Role::backing_file ? "backing file" : "data file",
                                reference.name));
    };
}

namespace {

FileOptions options_for(const FileReference& reference, bool force_share, bool direct) {
    FileOptions options;
    options.writable = reference.writable;
    options.force_share = force_share && !reference.writable;
    options.direct = direct && reference.writable;
    return options;
}

}  // namespace

Gate local_files(bool force_share, bool direct) {
    return [=](const FileReference& reference) {
        return open_file(reference.path, options_for(reference, force_share, direct));
    };
}

Gate files_beneath(const std::string& directory, bool force_share, bool direct) {
    return [=, opened = std::make_shared<const Directory>(directory)](
               const FileReference& reference) -> Result<std::shared_ptr<Storage>> {
        const auto refuse = [&](std::string why) {
            return fail(Errc::refused_by_policy, reference.path, std::move(why));
        };
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
        const auto location = fs::path(reference.path).lexically_relative(directory);
        return opened->open_file(location.string(), reference.path, options_for(reference, force_share, direct));
    };
}

}  // namespace qcow
