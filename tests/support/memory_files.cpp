#include "support/memory_files.h"

namespace qcow::test {

Gate gate_to(Files files) {
    return [files = std::move(files)](const FileReference& reference) -> Result<std::shared_ptr<Storage>> {
        const auto found = files.find(reference.name);
        if (found == files.end()) return std::unexpected(Error{Errc::not_found, reference.name, "not among the files"});
        return found->second;
    };
}

Bytes contents_of(const Storage& storage) {
    Bytes result(value_of(storage.size()));
    value_of(storage.read({0}, result));
    return result;
}

Files copy_of(const Files& files) {
    Files result;
    for (const auto& [name, storage] : files) result[name] = memory_storage(contents_of(*storage), name);
    return result;
}

void save(const Files& files, const std::filesystem::path& directory) {
    for (const auto& [name, storage] : files) {
        const auto bytes = contents_of(*storage);
        std::ofstream out(directory / name, std::ios::binary | std::ios::trunc);
        out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        if (!out.flush()) throw std::runtime_error("cannot write " + name);
    }
}

std::shared_ptr<Storage> load(const std::string& path, const std::string& name) {
    const auto text = file_bytes(path);
    const auto bytes = std::as_bytes(std::span(text));
    return memory_storage({bytes.begin(), bytes.end()}, name);
}

}  // namespace qcow::test
