#pragma once
// The Sleuth Kit, loaded when it is needed.

#include <tsk/libtsk.h>

#include "qcow/error.h"

namespace qcow {

/// The functions of The Sleuth Kit that are used here. Its library is not linked: it takes thirty others with it, and
/// would make every start of a program three times as long. Its own symbols stay apart, too: some have the names of
/// libext2fs's.
struct SleuthKit {
    decltype(&tsk_error_get) error_get = nullptr;
    decltype(&tsk_error_reset) error_reset = nullptr;
    decltype(&tsk_fs_block_walk) fs_block_walk = nullptr;
    decltype(&tsk_fs_close) fs_close = nullptr;
    decltype(&tsk_fs_dir_close) fs_dir_close = nullptr;
    decltype(&tsk_fs_dir_get_name) fs_dir_get_name = nullptr;
    decltype(&tsk_fs_dir_getsize) fs_dir_getsize = nullptr;
    decltype(&tsk_fs_dir_open_meta) fs_dir_open_meta = nullptr;
    decltype(&tsk_fs_file_attr_get) fs_file_attr_get = nullptr;
    decltype(&tsk_fs_file_close) fs_file_close = nullptr;
    decltype(&tsk_fs_file_open_meta) fs_file_open_meta = nullptr;
    decltype(&tsk_fs_file_read) fs_file_read = nullptr;
    decltype(&tsk_fs_open_img) fs_open_img = nullptr;
    decltype(&tsk_fs_type_toname) fs_type_toname = nullptr;
    decltype(&tsk_img_close) img_close = nullptr;
    decltype(&tsk_img_open_external) img_open_external = nullptr;
};

/// Loads the library with the first call. The functions are there for the rest of the process's life.
/// Errors: Errc::unsupported: it is not installed.
/// Thread safety: may be called from any number of threads.
Result<const SleuthKit*> load_sleuth_kit();

}  // namespace qcow
