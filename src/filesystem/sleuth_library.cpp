#include "filesystem/sleuth_library.h"

#include <fmt/format.h>

#include <string>

#include "base/loaded_library.h"
#include "base/try.h"

namespace qcow {
namespace {

struct Loaded {
    SleuthKit kit;
    std::string error;
};

Loaded load() {
    Loaded result;
    LoadedLibrary library(QCOW_TSK_LIBRARY);
    auto& kit = result.kit;
    library.find(kit.error_get, "tsk_error_get");
    library.find(kit.error_reset, "tsk_error_reset");
    library.find(kit.fs_block_walk, "tsk_fs_block_walk");
    library.find(kit.fs_close, "tsk_fs_close");
    library.find(kit.fs_dir_close, "tsk_fs_dir_close");
    library.find(kit.fs_dir_get_name, "tsk_fs_dir_get_name");
    library.find(kit.fs_dir_getsize, "tsk_fs_dir_getsize");
    library.find(kit.fs_dir_open_meta, "tsk_fs_dir_open_meta");
    library.find(kit.fs_file_attr_get, "tsk_fs_file_attr_get");
    library.find(kit.fs_file_close, "tsk_fs_file_close");
    library.find(kit.fs_file_open_meta, "tsk_fs_file_open_meta");
    library.find(kit.fs_file_read, "tsk_fs_file_read");
    library.find(kit.fs_open_img, "tsk_fs_open_img");
    library.find(kit.fs_type_toname, "tsk_fs_type_toname");
    library.find(kit.img_close, "tsk_img_close");
    library.find(kit.img_open_external, "tsk_img_open_external");
    result.error = library.error();
    return result;
}

}  // namespace

Result<const SleuthKit*> load_sleuth_kit() {
    static const Loaded loaded = load();
    if (loaded.error.empty()) return &loaded.kit;
    return fail(Errc::unsupported, "The Sleuth Kit",
                fmt::format("it cannot be loaded ({}); install its library (Debian: libtsk19)", loaded.error));
}

}  // namespace qcow
