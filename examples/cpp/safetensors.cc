#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>

#include "error.h"
#include "half.h"
#include "json.h"

namespace trainer {
namespace {

// An open file descriptor that closes itself.
class File {
 public:
  File(const std::string& path, int flags) : number_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (number_ < 0) fail(path, ": cannot be opened (", std::strerror(errno), ")");
  }
  ~File() { ::close(number_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int number() const { return number_; }

 private:
  int number_;
};

struct Mapping {
  std::shared_ptr<const void> memory;
  size_t size;
};

Mapping map_file(const std::string& path) {
  const File file(path, O_RDONLY);
  struct stat status;
  if (::fstat(file.number(), &status) != 0) fail(path, ": cannot be read (", std::strerror(errno), ")");
  const auto size = static_cast<size_t>(status.st_size);
  if (size < 8) fail(path, ": ", size, " bytes is too short for a safetensors file");
  void* memory = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.number(), 0);
  if (memory == MAP_FAILED) fail(path, ": cannot be mapped (", std::strerror(errno), ")");
  return {std::shared_ptr<const void>(memory, [size](const void* at) { ::munmap(const_cast<void*>(at), size); }), size};
}

lemo_dtype dtype_of(const std::string& name, const std::string& where) {
  if (name == "F32") return LEMO_F32;
  if (name == "F16") return LEMO_F16;
  if (name == "BF16") return LEMO_BF16;
  fail(where, ": dtype ", name, " is not supported; expected F32, F16 or BF16 (a quantised model has to be converted)");
}

size_t size_of(lemo_dtype dtype) { return dtype == LEMO_F32 || dtype == LEMO_I32 ? 4 : 2; }

}  // namespace

int64_t StoredTensor::count() const {
  int64_t product = 1;
  for (const int64_t n : shape) product *= n;
  return product;
}

std::vector<float> StoredTensor::floats() const {
  std::vector<float> out(static_cast<size_t>(count()));
  if (dtype == LEMO_F32) {
    std::memcpy(out.data(), data, out.size() * sizeof(float));
    return out;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t bits;
    std::memcpy(&bits, data + 2 * i, sizeof bits);  // tensors need not be aligned within the file
    out[i] = dtype == LEMO_BF16 ? bf16_to_float(bits) : f16_to_float(bits);
  }
  return out;
}

Safetensors Safetensors::open_file(const std::string& path) {
  Safetensors result;
  result.where_ = path;
  result.add(path);
  return result;
}

Safetensors Safetensors::open_folder(const std::string& folder) {
  Safetensors result;
  result.where_ = folder;
  const std::string single = folder + "/model.safetensors";
  const std::string index = single + ".index.json";
  if (std::filesystem::exists(single)) {
    result.add(single);
  } else if (std::filesystem::exists(index)) {
    const Json document = Json::read(index);
    const Json* map = document.find("weight_map");
    if (map == nullptr) fail(index, ": has no weight_map");
    std::set<std::string> files;
    for (const auto& [name, file] : map->object(index + ": weight_map")) files.insert(file.string(index + ": " + name));
    for (const auto& file : files) result.add(folder + "/" + file);
  } else {
    fail(folder, ": holds neither model.safetensors nor model.safetensors.index.json; other formats are not read");
  }
  return result;
}

void Safetensors::add(const std::string& path) {
  const Mapping mapping = map_file(path);
  const auto* start = static_cast<const unsigned char*>(mapping.memory.get());
  uint64_t header = 0;
  for (int i = 7; i >= 0; --i) header = header << 8 | start[i];  // little-endian on any machine
  if (header > mapping.size - 8) fail(path, ": the header ends beyond the file: truncated, or not a safetensors file");
  const std::string_view text(reinterpret_cast<const char*>(start) + 8, header);
  const uint64_t room = mapping.size - 8 - header;
  const Json document = Json::parse(text, path);
  for (const auto& [name, entry] : document.object(path)) {
    if (name == "__metadata__") continue;
    const std::string where = path + ": " + name;
    const Json* dtype = entry.find("dtype");
    const Json* shape = entry.find("shape");
    const Json* offsets = entry.find("data_offsets");
    if (dtype == nullptr || shape == nullptr || offsets == nullptr) fail(where, ": lacks dtype, shape or data_offsets");
    StoredTensor tensor{dtype_of(dtype->string(where), where), {}, nullptr, path};
    double count = 1;  // a double cannot overflow on hostile shapes
    for (const Json& n : shape->array(where)) {
      tensor.shape.push_back(n.integer(where));
      if (tensor.shape.back() < 0) fail(where, ": has a negative size");
      count *= static_cast<double>(tensor.shape.back());
    }
    const Json::Array& range = offsets->array(where);
    if (range.size() != 2) fail(where, ": expected two data_offsets");
    const double begin = range[0].number(where);
    const double end = range[1].number(where);
    if (!(begin >= 0 && end - begin == count * static_cast<double>(size_of(tensor.dtype)) &&
          end <= static_cast<double>(room))) {
      fail(where, ": its data_offsets do not fit its shape or the file: truncated?");
    }
    tensor.data = start + 8 + header + static_cast<uint64_t>(begin);
    if (!tensors_.emplace(name, std::move(tensor)).second) fail(where, ": stored twice");
  }
  mappings_.push_back(mapping.memory);
}

const StoredTensor& Safetensors::get(const std::string& name, const std::vector<int64_t>& shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail(where_, ": tensor ", name, " is missing");
  if (found->second.shape != shape) {
    fail(found->second.file, ": ", name, " has shape ", shape_text(found->second.shape), ", expected ",
         shape_text(shape));
  }
  return found->second;
}

void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors) {
  std::ostringstream header;
  std::vector<Bytes> parts(2);
  size_t offset = 0;
  header << "{\"__metadata__\":{\"format\":\"pt\"}";
  for (const NamedTensor& tensor : tensors) {
    size_t bytes = size_of(tensor.dtype);
    for (const int64_t n : tensor.shape) bytes *= static_cast<size_t>(n);
    header << ',' << json_quoted(tensor.name) << ":{\"dtype\":\"" << (tensor.dtype == LEMO_F32 ? "F32" : "I32")
           << "\",\"shape\":" << shape_text(tensor.shape) << ",\"data_offsets\":[" << offset << ',' << offset + bytes
           << "]}";
    parts.push_back({tensor.data, bytes});
    offset += bytes;
  }
  header << '}';
  std::string text = header.str();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the format aligns tensors to 8 bytes
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(text.size() >> (8 * i));
  parts[0] = {length, sizeof length};
  parts[1] = {text.data(), text.size()};
  write_file(path, parts);
}

void write_file(const std::string& path, const std::vector<Bytes>& parts) {
  const File file(path, O_WRONLY | O_CREAT | O_TRUNC);
  for (const Bytes& part : parts) {
    const auto* at = static_cast<const unsigned char*>(part.data);
    for (size_t left = part.size; left > 0;) {
      const ssize_t written = ::write(file.number(), at, left);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail(path, ": cannot be written (", std::strerror(errno), ")");
      at += written;
      left -= static_cast<size_t>(written);
    }
  }
  if (::fsync(file.number()) != 0) fail(path, ": cannot be flushed (", std::strerror(errno), ")");
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace trainer
