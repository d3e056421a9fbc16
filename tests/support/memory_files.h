#pragma once
// An image and the files that it names, all in memory.

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "qcow/image.h"
#include "support/bytes.h"
#include "support/disks.h"

namespace qcow::test {

/// By the names that the images use.
using Files = std::map<std::string, std::shared_ptr<Storage>>;

/// What the image under test is called among its Files.
inline const std::string image_name = "disk.qcow2";

/// Opens what is among the files, and nothing else.
Gate gate_to(Files files);

Bytes contents_of(const Storage& storage);

Files copy_of(const Files& files);

void save(const Files& files, const std::filesystem::path& directory);

/// One file of a directory, in memory.
std::shared_ptr<Storage> load(const std::string& path, const std::string& name);

}  // namespace qcow::test
