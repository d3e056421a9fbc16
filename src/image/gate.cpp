#include <fmt/format.h>

#include "base/try.h"
#include "qcow/image.h"

namespace qcow {

Gate no_files() {
    return [](const FileReference& reference) -> Result<std::shared_ptr<Storage>> {
        return fail(Errc::refused_by_policy, reference.named_by,
                    fmt::format("it names the {} \"{}\", and opening further files was not allowed",
                                reference.role == FileReference::Role::backing_file ? "backing file" : "data file",
                                reference.name));
    };
}

Gate local_files(bool force_share, bool direct) {
    return [=](const FileReference& reference) {
        FileOptions options;
        options.writable = reference.writable;
        options.force_share = force_share && !reference.writable;
        options.direct = direct && reference.writable;
        return open_file(reference.path, options);
    };
}

}  // namespace qcow
