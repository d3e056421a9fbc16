#pragma once
// What the commands share that look into disks: naming a disk and its partition, opening it, and texts about files.

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "command.h"
#include "qcow/filesystem.h"

namespace tool {

/// The disk to look into, as named on the command line: "DISK" or "DISK:N".
struct DiskName {
    Source source;
    std::optional<unsigned> partition;  // none: the disk itself, or its only partition
    bool ignores_checksums = false;
};

/// Splits "DISK:N" into disk and partition. The name is not split if a file has the whole name.
std::pair<std::string, std::optional<unsigned>> split_partition(const std::string& name);

/// Adds the argument DISK, with all options of commands that read an image. `snapshot`: the name of the option for
/// that.
void add_disk_options(CLI::App& app, DiskName& disk, const std::string& snapshot = "-l,--snapshot");

/// Adds --ignore-checksums.
void add_checksum_option(CLI::App& app, DiskName& disk);

/// A file system that was opened for reading.
struct Inside {
    std::shared_ptr<qcow::Image> image;
    std::shared_ptr<qcow::Disk> disk;         // that holds the file system: a partition, or all of it
    std::unique_ptr<qcow::FileSystem> files;  // read by a confined process
};

qcow::Result<Inside> open_inside(const DiskName& name);

/// Opens the file system of this disk with a confined process.
qcow::Result<std::unique_ptr<qcow::FileSystem>> open_files(std::shared_ptr<qcow::Disk> disk,
                                                           qcow::Access access = qcow::Access::read);

/// "DISK" or "DISK:N", for messages.
std::string place_of(const std::string& disk, std::optional<unsigned> partition);

/// Returns the file at a path of the command line, as qcow::find_path. If there is none, bytes may be written as `ls`
/// shows them: "\xNN". Errors: Errc::invalid_argument: both readings of the path lead to a file.
qcow::Result<qcow::Inode> find_shown_path(qcow::FileSystem& files, const std::string& path, bool follow = true);

/// Prints the file system's warnings.
void warn_about(qcow::FileSystem& files);

/// "drwxr-xr-x"
std::string mode_text(const qcow::FileInfo& info);
/// "regular", "directory", ...
std::string type_text(qcow::FileType type);
/// "2026-01-31 12:00:00", in local time; "-" without a time.
std::string time_text(const std::optional<qcow::Timestamp>& time);
/// "vfat "EFI"": type and label
std::string content_text(const qcow::Content& content);
/// Adds a text of a disk. If it is no UTF-8, "KEY-base64" has its bytes.
void add_text(Json& json, const std::string& key, const std::string& text);
/// The properties of a file.
Json file_json(const qcow::FileInfo& info);
/// The parts of a disk, for `qcow partitions` and `qcow info`.
Json partitions_json(const qcow::PartitionTable& table);

/// Reports an error of a single file.
void complain_about(const std::string& path, const qcow::Error& error);

}  // namespace tool
